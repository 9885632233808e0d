"""What keeps training stable, from the DeepSeek-V4 report; all of it off unless a recipe asks for it."""
