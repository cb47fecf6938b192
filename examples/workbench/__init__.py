"""What the commands in examples/ share."""
