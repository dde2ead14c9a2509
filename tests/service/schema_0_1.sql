CREATE TABLE blobs (
	project VARCHAR NOT NULL, 
	sha256 VARCHAR NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	create_time BIGINT NOT NULL, 
	PRIMARY KEY (project, sha256)
);
CREATE TABLE uploads (
	id VARCHAR NOT NULL, 
	project VARCHAR NOT NULL, 
	sha256 VARCHAR NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	committed_size BIGINT NOT NULL, 
	writer_epoch BIGINT NOT NULL, 
	state VARCHAR NOT NULL, 
	expire_time BIGINT NOT NULL, 
	PRIMARY KEY (id)
);
CREATE TABLE checkpoints (
	project VARCHAR NOT NULL, 
	id VARCHAR NOT NULL, 
	architecture VARCHAR NOT NULL, 
	num_parameters BIGINT NOT NULL, 
	vocab_size BIGINT NOT NULL, 
	max_positions BIGINT, 
	stored_dtype VARCHAR NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	parameters JSON NOT NULL, 
	create_time BIGINT NOT NULL, 
	PRIMARY KEY (project, id)
);
CREATE TABLE checkpoint_files (
	project VARCHAR NOT NULL, 
	checkpoint_id VARCHAR NOT NULL, 
	path VARCHAR NOT NULL, 
	sha256 VARCHAR NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	PRIMARY KEY (project, checkpoint_id, path)
);
CREATE TABLE data_batches (
	project VARCHAR NOT NULL, 
	id VARCHAR NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	num_sequences BIGINT NOT NULL, 
	sequence_length BIGINT NOT NULL, 
	num_targets BIGINT NOT NULL, 
	max_token_id BIGINT NOT NULL, 
	has_attention_mask BOOLEAN NOT NULL, 
	create_time BIGINT NOT NULL, 
	PRIMARY KEY (project, id)
);
CREATE TABLE vectors (
	project VARCHAR NOT NULL, 
	id VARCHAR NOT NULL, 
	checkpoint_id VARCHAR NOT NULL, 
	dtype VARCHAR NOT NULL, 
	num_elements BIGINT NOT NULL, 
	recipe JSON, 
	generation VARCHAR NOT NULL, 
	create_time BIGINT NOT NULL, 
	PRIMARY KEY (project, id)
);
CREATE TABLE jobs (
	project VARCHAR NOT NULL, 
	id VARCHAR NOT NULL, 
	spec JSON NOT NULL, 
	labels JSON NOT NULL, 
	state VARCHAR NOT NULL, 
	attempt INTEGER NOT NULL, 
	max_attempts INTEGER NOT NULL, 
	lease_owner VARCHAR NOT NULL, 
	lease_expire BIGINT NOT NULL, 
	progress JSON, 
	result JSON, 
	error JSON, 
	last_sequence BIGINT NOT NULL, 
	create_time BIGINT NOT NULL, 
	start_time BIGINT, 
	end_time BIGINT, 
	PRIMARY KEY (project, id)
);
CREATE INDEX ix_jobs_state ON jobs (state);
CREATE TABLE job_events (
	project VARCHAR NOT NULL, 
	job_id VARCHAR NOT NULL, 
	sequence BIGINT NOT NULL, 
	time BIGINT NOT NULL, 
	body JSON NOT NULL, 
	PRIMARY KEY (project, job_id, sequence)
);
CREATE TABLE requests (
	project VARCHAR NOT NULL, 
	method VARCHAR NOT NULL, 
	request_id VARCHAR NOT NULL, 
	payload_sha256 VARCHAR NOT NULL, 
	response BLOB NOT NULL, 
	create_time BIGINT NOT NULL, 
	PRIMARY KEY (project, method, request_id)
);
CREATE TABLE server (
	schema_version INTEGER NOT NULL, 
	page_token_key BLOB NOT NULL, 
	PRIMARY KEY (schema_version)
);
