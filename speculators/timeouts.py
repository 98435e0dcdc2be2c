"""Timeouts, grace periods and polling intervals of the package, in seconds. Options of a recipe are not among them.

`runner/environment.py` and `runner/servers/guard.py` have their own: they run where this package cannot be imported.
"""

MIN_POLL_SECONDS, MAX_POLL_SECONDS = 0.002, 0.05
"""Interval at which a run checks its workers: short after an event, to start the next stage; longer while idle."""
WORKER_GRACE_SECONDS = 30.0
"""A worker's time between SIGTERM and SIGKILL, in which it writes a checkpoint; also after the runner has died."""
WORKER_HEARTBEAT_SECONDS = 10.0
"""Interval between two heartbeats in a worker's claim, which only inform whoever waits for its artifact."""
JOB_POLL_SECONDS = 0.1
"""Interval at which a cluster job checks its worker, its servers and the runner's lease."""
CLUSTER_QUERY_SECONDS = 0.5
"""Interval at which the runner queries a cluster for a job: a query may be expensive."""
JOB_RESULT_SECONDS = 60.0
"""Time after a remote job's end until its last note must be visible: network file systems delay it."""
HEARTBEAT_SECONDS = 2.0
"""Interval between two heartbeats of a lease."""
LEASE_SECONDS = 60.0
"""Time without a heartbeat after which a holder on another machine counts as dead; 30 heartbeats may be late."""
SERVER_PROBE_SECONDS = 0.2
"""Interval between two health checks of a server that starts."""
HEALTH_CHECK_SECONDS = 5.0
"""Time in which a server has to answer a health check; a busy one needs seconds."""
FIRST_ANSWER_SECONDS = 600.0
"""Time in which a new server has to answer its first request, which may compile kernels."""
SERVER_STOP_POLL_SECONDS = 0.02
"""Interval between two checks whether a stopping server is gone."""
SERVER_GRACE_SECONDS = 10.0
"""A server's time between SIGTERM and SIGKILL."""
SERVER_DEATH_SECONDS = 3.0
"""Time in which a server that a worker cannot reach may turn out dead: its guard first ends the rest of its tree."""
NVIDIA_SMI_SECONDS = 30.0
"""Time that nvidia-smi may take: without its persistence daemon it first initializes every GPU."""
HUB_SECONDS = 10.0
"""Time in which the Hugging Face hub has to answer which commit a revision is: a small request, on a slow network."""
TRACKER_SECONDS = 3.0
"""Time in which the server of a tracker has to accept a connection while a run is planned."""
DISK_CHECK_SECONDS = 5.0
"""Shortest interval between two checks of the store's free space; measuring the store takes at most 1 % of the time."""
SWEEP_POLL_SECONDS = 0.5
"""Interval at which a job in another process checks whether the sweep's process still exists."""
GIT_SECONDS = 5.0
"""Time that git may take after its stage has ended: it ran meanwhile, and only a huge repository needs longer."""
FIRST_PROBE_SECONDS, MAX_PROBE_SECONDS = 0.25, 15.0
"""First and longest delay between health checks of a server that failed: doubled each time, to let it recover."""
FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.5, 15.0
"""First and longest delay before a failed request is sent again: doubled each time, to relieve a busy server."""
MIN_TRANSFER_POLL_SECONDS, MAX_TRANSFER_POLL_SECONDS = 0.001, 0.05
"""First and longest interval at which a client checks whether hidden states are complete; most are at once."""
TRANSFER_HEALTH_SECONDS = 2.0
"""Interval of the health checks while a client waits for hidden states, which a dead server never completes."""
METRICS_SECONDS = 30.0
"""Time in which a server has to answer with its metrics page; a busy one needs seconds."""
METRICS_POLL_SECONDS = 0.05
"""Interval between two readings of that page: longer than an engine step, after which the counters no longer change."""
MOONCAKE_MASTER_SECONDS = 5.0
"""Time in which Mooncake's master has to accept a connection; Mooncake itself would retry for a minute and a half."""
COLLECTIVE_TIMEOUT_SECONDS = 1800.0
"""Time that a collective waits for the other ranks, which may write a checkpoint or wait for hidden states."""
RANK_GRACE_SECONDS = 5.0
"""Time that child ranks have to end by themselves after rank 0, or to report why they failed."""
SYNC_SECONDS = 1.0
"""Longest time between two fsyncs of answers: a machine that crashes loses those since then, a killed process none."""
