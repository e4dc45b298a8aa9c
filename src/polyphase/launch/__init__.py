"""Starts the processes of a deployment on this machine, keeps them running, and ends them so that nothing stays behind.

In comes a plan (which processes, where, with how many cores); out comes news about each process. It knows processes, folders and signals,
and nothing of requests or models.
"""

from polyphase.launch.joining import JoinedWorkers, plan_joining
from polyphase.launch.local import LocalDeployment
from polyphase.launch.plan import DeploymentPlan, plan_deployment
from polyphase.launch.run_folder import DeploymentRecord, find_deployment, living_deployments
from polyphase.launch.supervisor import Exited, News, Ready, Started, StartFailed, Stopping

__all__ = [
    "DeploymentPlan",
    "DeploymentRecord",
    "Exited",
    "JoinedWorkers",
    "LocalDeployment",
    "News",
    "Ready",
    "StartFailed",
    "Started",
    "Stopping",
    "find_deployment",
    "living_deployments",
    "plan_deployment",
    "plan_joining",
]
