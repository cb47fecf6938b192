"""What the commands in examples/ share.

Mistakes of the user end a command with a SystemExit, whose text says what is wrong and what to do.
"""
