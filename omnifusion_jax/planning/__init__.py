"""What a run or a request takes of devices that are not there, by compiling for them."""
