-- Run once, when PostgreSQL starts with an empty folder.
CREATE DATABASE prefect;
CREATE DATABASE mlflow;
CREATE DATABASE mlflow_accounts;
