"""What is known of a target model: its checkpoint, and the server that runs it."""
