"""Tables and plots of what was obtained."""
