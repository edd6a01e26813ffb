"""The engine: many requests share the slots of one cache, and enter and leave between two tokens.

    handle.py     what a caller holds: tokens, text, the answer, a way to give it up
    engine.py     Engine: takes requests from any thread, has a thread of its own or is driven by who waits
    scheduler.py  who is in the slots and what runs next: let in, read, choose, let out
    task.py       a request on its way; which beginnings of prompts are equal
    slots.py      the slots as the host sees them: who is in them, what they hold
    device.py     what is on the device, and the calls that change it
    features.py   feature rows of media, each tile encoded once
    programs.py   what runs on the device: encode, extend, copy, advance
    warmup.py     every program once, before anybody waits
    sizes.py      the few sizes that programs are compiled for

A request becomes a Task. The scheduler gives it a slot (several draws take as many), in which the beginning
of its prompt may stand already; otherwise it is copied from another slot, or read in pieces by `extend`.
Then `advance` chooses its tokens together with those of all others, whatever they ask for: options are data.
Only sizes are compiled in.
"""

from omnifusion_jax.inference.engine.engine import Engine

__all__ = ["Engine"]
