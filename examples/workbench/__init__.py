"""What the commands in examples/ share.

What users can get wrong ends the command with a SystemExit, whose text says what is wrong and what to do.
"""
