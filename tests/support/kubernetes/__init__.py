"""A Kubernetes API server with Job, JobSet and Kueue controllers whose pods are local processes.

Start: cluster.py, a whole one; api_server.py answers kubectl and Python clients.
"""
