"""The commands of the command line, one module each; nothing else imports them."""
