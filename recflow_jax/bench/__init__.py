"""What `recflow bench` measures: contenders on equal inputs, beside what the device could do."""
