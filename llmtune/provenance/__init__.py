"""Where an export comes from, and what whoever passes it on must do.

licenses    which licence a base model is under, and what that asks for
card        the model card, README.md
papers      card, notice and provenance.json, written beside exported weights
"""

from llmtune.provenance.licenses import Found, License, settle_license
from llmtune.provenance.papers import Papers, carry_papers, write_papers

__all__ = ["Found", "License", "Papers", "carry_papers", "settle_license", "write_papers"]
