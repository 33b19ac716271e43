"""What `make bench` measures: each concern of speed against its simple rival."""
