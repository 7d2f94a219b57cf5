"""One model on several devices: every process holds a share of every layer, and all make each pass together."""
