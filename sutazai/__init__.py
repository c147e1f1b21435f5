"""SutazAI: agents as a durable, distributed task system. Importing this package does nothing."""
