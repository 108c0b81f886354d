"""Processes: how each role starts, what it is given, and how `afd up` keeps a whole cluster on one host alive.

launch        what a supervised child is told, and over which pipes (both ends)
launcher      spawn one child, read its news and its stderr
role_process  the frame of every role's process: signals, supervisor pipe, deadlines, exit codes
roles         role name -> the function that runs it, wired to secret and membership
supervisor    `afd up`: start, progress, ready, restarts, drain; restart, shutdown: its decisions (pure)
resolve       configuration -> what this host can run: threads, model, ports
run_file      how `afd status` finds a running `afd up`
"""
