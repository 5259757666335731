"""The yardstick: how good the LoRAs are that this tool trains, in numbers that can be made again on any machine."""
