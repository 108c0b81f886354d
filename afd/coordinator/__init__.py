"""The coordinator: who is in the cluster, under which rank, in which epoch, with which plan.

state      the decisions: registrations, heartbeats and time in, views and actions out (no I/O)
members    what is known of one member, and when it counts as lost (no I/O)
plan       the pipeline plan of a view
service    gRPC around the state;  client  what the other roles call;  membership  their side thread
"""
