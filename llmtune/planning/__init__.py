"""What a run would take on devices that are not here: its train step, compiled ahead of time and read.

topology     names of slices and hosts -> devices that nobody has to own
ahead        the very train step of a run, compiled for them
collectives  what the compiled program exchanges, by kind and mesh axis
costs        FLOPs and bytes in closed form
memory       bytes per device in closed form, for search and where there is no compiler
roofline     the time that each part takes at the chip's published rates
plan         all of it, as a story
"""
