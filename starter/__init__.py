"""How the embedded starter model is made: grammar -> corpus -> tokenizer -> pre-training -> Hugging Face directory."""
