"""The detection of runs that stop moving. Every rank reports its position from a thread beside its
training. When no rank makes progress, or a rank is gone, one page says who is missing and what each
rank was doing, and all ranks end.

    beats.py            a rank's report of itself, and which ranks are silent; when that is a hang
    flight_recorder.py  the collectives that this rank came to, as torch recorded them (gloo, NCCL)
    stacks.py           where in the code this rank is, even when its interpreter does not run
    autopsy.py          the rank at fault, and the page
    watchdog.py         the threads, and the end of all ranks
    slow.py             which rank is slow, and at what
    lost.py             what a lost peer looks like from inside a collective

Ranks talk through torch's store instead of collectives, because collectives are what hangs.
"""
