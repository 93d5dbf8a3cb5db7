"""An engine in another process: the messages, the client, and the scripts that answer in the other interpreter."""
