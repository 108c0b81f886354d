"""Makes what can be run of a request's bytes: decoding, chat template, tokens, checks.

All of it is work that holds the interpreter and grows with what a client sends. Small requests are read on the event
loop; all others in child processes, so that nobody's stream waits for somebody's prompt.
"""
