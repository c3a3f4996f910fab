"""Conversations and questions about images."""
