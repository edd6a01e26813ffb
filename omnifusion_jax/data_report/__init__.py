"""What a data set holds and what is wrong with it, looked at as training would read it."""
