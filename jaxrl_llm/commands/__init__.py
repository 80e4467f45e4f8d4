"""What `jaxrl` does, a module a command or a few that belong together; `jaxrl_llm.cli` parses their options."""
