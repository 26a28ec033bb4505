"""Runs that stop moving: every rank tells what it is at, from a thread beside its training; when nobody gets on, or a rank is
gone, one page says who is missing and what each rank was doing, and all ranks end.

    beats.py            what a rank says of itself, and who has not been heard of; when that is a hang
    flight_recorder.py  the collectives that this rank came to, as torch recorded them (gloo and NCCL)
    stacks.py           where in the code this rank is, also when its interpreter does not run
    autopsy.py          who did it, and the page
    watchdog.py         the threads, and how all ranks end
    slow.py             which rank is slow, and at what
    lost.py             what a lost peer looks like from inside a collective

Ranks talk through torch's store, not through collectives: those are what hangs.
"""
