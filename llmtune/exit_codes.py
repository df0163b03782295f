"""What the exit code of `llmtune` says, to whoever started it: a person, a scheduler, or `--supervise`.

Whether starting again helps is what a code is for: HUNG, RETRY and signals say that the same command goes on from the last
checkpoint; USAGE and GAVE_UP say that something must be mended first.
"""

import signal

DONE = 0  # finished
USAGE = 2  # a mistake in what was given; one line says which, and how to mend it
HUNG = 70  # no step was finished for longer than safeguards.hang_seconds allows; stacks are in the run's directory
RETRY = 75  # something around the run failed (another process, the disk); the same command goes on
GAVE_UP = 76  # the run itself went wrong (numbers that are no numbers); starting again would end the same way
INTERRUPTED = 128 + signal.SIGINT  # 130, after the step was finished and saved
TERMINATED = 128 + signal.SIGTERM  # 143, likewise
UNREAD = 141  # 128 + SIGPIPE: who read the output has read enough

FINAL = (DONE, USAGE, GAVE_UP)  # starting again changes nothing
