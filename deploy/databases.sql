-- One Postgres for all three; its first start runs this. The database kshot is made by POSTGRES_DB.
CREATE DATABASE mlflow;
CREATE DATABASE prefect;
