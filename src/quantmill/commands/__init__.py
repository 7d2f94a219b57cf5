"""What a command does, from what the user typed to what is on disk; `cli` only parses and prints."""
