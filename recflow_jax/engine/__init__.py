"""The engine: requests in from any thread, batches through the device, answers out."""
