"""What approximate passes share: layers, and runs of two graphs side by side."""
