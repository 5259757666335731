"""`python tools/bench`: quality, speed and memory of this trainer, in numbers that can be measured again on any machine."""
