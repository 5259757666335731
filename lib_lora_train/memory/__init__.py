"""What a step takes before it is made, the plan by which it fits, and activations kept in the CPU's memory."""
