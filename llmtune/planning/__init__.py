"""What a run would take on devices that are not here: its train step, compiled ahead of time and read.

topology     names of slices and hosts -> devices that nobody has to own
abstract     a run's weights, state and batch as shapes; layout: on one mesh, under one strategy
costs, memory, traffic, roofline     FLOPs, bytes, exchanges and least time, in closed form
ahead        the very train step, given to the compiler; hlo, collectives: what its program exchanges; cache: kept
plan         all of it, as a story
candidates, search, mend    the layouts that there are, the best of them, the nearest change that fits
text, record, report        a table, data, a page
"""
