"""A conversation with a model, line by line.

loop.py       lines become questions or commands; answers are printed as they come
talk.py       what was said and shown so far, and what of it still fits the model
commands.py   the table of commands that begin with /
typed.py      file names as people type them, or drag them into a terminal
lines.py      where lines come from: a terminal with editing and memory, or a pipe
pictures.py   pictures drawn in the terminals that can
"""
