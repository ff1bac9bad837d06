"""The same ingest and query on the nodes of a Ray cluster; Ray itself is loaded when one is asked for."""

from rapidin_vdb.cluster.connection import connect, session_of
from rapidin_vdb.cluster.making import road_on_cluster
from rapidin_vdb.cluster.searching import ClusterIndex, ClusterKeeper

__all__ = ["ClusterIndex", "ClusterKeeper", "connect", "road_on_cluster", "session_of"]
