"""The role that each method takes."""

from __future__ import annotations

from hvp_service.identity.caller import Role

#: `Service/Method` -> role. A method that is missing here takes the highest.
METHOD_ROLES: dict[str, Role] = {
    **dict.fromkeys(
        (
            "BlobService/DownloadBlob",
            "BlobService/FindMissingBlobs",
            "BlobService/GetBlob",
            "BlobService/GetUpload",
            "BlobService/ListBlobs",
            "CheckpointService/GetCheckpoint",
            "CheckpointService/ListCheckpoints",
            "DataBatchService/GetDataBatch",
            "DataBatchService/ListDataBatches",
            "JobService/GetJob",
            "JobService/ListJobs",
            "JobService/WaitJob",
            "JobService/WatchJob",
            "SystemService/GetQueue",
            "SystemService/GetServerInfo",
            "SystemService/ListWorkerGroups",
            "SystemService/WhoAmI",
            "VectorService/GetVector",
            "VectorService/ListVectors",
            "VectorService/ReadVector",
        ),
        "read",
    ),
    **dict.fromkeys(
        (
            "BlobService/CancelUpload",
            "BlobService/DeleteBlob",
            "BlobService/StartUpload",
            "BlobService/UploadBlob",
            "CheckpointService/CreateCheckpoint",
            "CheckpointService/DeleteCheckpoint",
            "CheckpointService/UpdateCheckpoint",
            "DataBatchService/CreateDataBatch",
            "DataBatchService/DeleteDataBatch",
            "JobService/CancelJob",
            "JobService/CreateJob",
            "JobService/DeleteJob",
            "JobService/UpdateJob",
            "OperatorService/ApplyOperator",
            "OperatorService/ComputeGradient",
            "OperatorService/DescribeOperator",
            "OperatorService/EvaluateForms",
            "OperatorService/EvaluateLoss",
            "OperatorService/EvaluateLossAlong",
            "SessionService/CreateSession",
            "SessionService/EndSession",
            "SessionService/RenewSession",
            "VectorService/CreateVector",
            "VectorService/DeleteVector",
            "VectorService/KeepVector",
            "VectorService/ReduceVectors",
            "VectorService/WriteVector",
        ),
        "submit",
    ),
    **dict.fromkeys(
        ("KeyService/CreateKey", "KeyService/ListKeys", "KeyService/RevokeKey"), "admin"
    ),
}


def role_of(method: str) -> Role:
    """The role that `Service/Method` takes."""
    return METHOD_ROLES.get(method, "admin")
