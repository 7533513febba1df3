"""Run rewritten graphs: lower them, find and make their caches, replay steps, and fall back on failures."""
