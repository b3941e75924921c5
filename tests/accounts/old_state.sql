PRAGMA foreign_keys=OFF;
BEGIN TRANSACTION;
CREATE TABLE users (
        name TEXT PRIMARY KEY, role TEXT NOT NULL, password_hash TEXT NOT NULL, disabled INTEGER NOT NULL DEFAULT 0
    , streams INTEGER, rpm INTEGER, tokens_per_day INTEGER) STRICT, WITHOUT ROWID;
INSERT INTO users VALUES('admin','admin','$argon2id$v=19$m=64,t=1,p=1$+9oTlAJQPmemv8oy7326Hw$TxMdsutuRqb0ywkx7EPIRV3fDx7UQATc9g4WM6wxF9c',0,NULL,NULL,NULL);
INSERT INTO users VALUES('ann','user','$argon2id$v=19$m=64,t=1,p=1$j99sV9pU5AJlhhhtx9V4tA$GfoSKv0mR2lTYv+n6U4Rw/1ttsuzY9BdFSWUWAGpIqE',0,NULL,7,5000);
INSERT INTO users VALUES('bob','user','$argon2id$v=19$m=64,t=1,p=1$aZMDaCE/hMXFcPJRazGxLg$G1H4n0aESDBloUieKZDTl+Yxa4sBB5V9DfEAvKkRScA',1,NULL,NULL,NULL);
INSERT INTO users VALUES('eve','auditor','$argon2id$v=19$m=64,t=1,p=1$Chh4SsnNpCinSOSb8n8KAw$HhzwjrQT7rY2KmVIJKMjjlyGNYvAaS6nmGCoqwRirg0',0,NULL,NULL,NULL);
CREATE TABLE revoked (jti TEXT PRIMARY KEY, expires REAL NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE refresh_tokens (
        jti TEXT PRIMARY KEY, family TEXT NOT NULL, owner TEXT NOT NULL, spent INTEGER NOT NULL DEFAULT 0,
        expires REAL NOT NULL
    ) STRICT, WITHOUT ROWID;
INSERT INTO refresh_tokens VALUES('b1ea1fb35fde4ef99f7f86fd44553af9','b1ea1fb35fde4ef99f7f86fd44553af9','admin',0,1796181760.0532078743);
INSERT INTO refresh_tokens VALUES('b5f7509baa61434cae672ff667b79ee3','b5f7509baa61434cae672ff667b79ee3','ann',0,1796181760.1896297932);
CREATE TABLE api_keys (
        id TEXT PRIMARY KEY, jti_hash TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, name TEXT NOT NULL,
        scopes TEXT NOT NULL, role TEXT NOT NULL, created REAL NOT NULL, expires REAL NOT NULL, last_used REAL,
        revoked INTEGER NOT NULL DEFAULT 0
    ) STRICT, WITHOUT ROWID;
INSERT INTO api_keys VALUES('143765e5d35249f7','ffd3630ee2fdf23e449f16775672b73eb9e1993c8cc7e63121d58fdca2633557','ann','revoked','generate models','user',1795576960.2378823757,1827199360.2378823758,NULL,1);
INSERT INTO api_keys VALUES('98dbd10dd0dadb38','e014330d0d10b2cc471ba4d86b82af5fe4483c193ee0bf42852cd94cb4301a25','ann','laptop','generate models','user',1795576960.2041966914,1827199360.2041966915,NULL,0);
CREATE TABLE tickets (
        id_hash TEXT PRIMARY KEY, owner TEXT NOT NULL, body BLOB NOT NULL, expires REAL NOT NULL
    ) STRICT;
CREATE TABLE days (
        owner TEXT NOT NULL, day INTEGER NOT NULL, tokens INTEGER NOT NULL, PRIMARY KEY (owner, day)
    ) STRICT, WITHOUT ROWID;
INSERT INTO days VALUES('ann',20782,18);
CREATE TABLE reservations (
        id TEXT PRIMARY KEY, owner TEXT NOT NULL, day INTEGER NOT NULL, tokens INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
CREATE INDEX revoked_by_expiry ON revoked (expires);
CREATE INDEX refresh_tokens_by_family ON refresh_tokens (family);
CREATE INDEX refresh_tokens_by_expiry ON refresh_tokens (expires);
CREATE INDEX api_keys_by_owner ON api_keys (owner);
CREATE INDEX tickets_by_expiry ON tickets (expires);
CREATE INDEX reservations_by_owner ON reservations (owner, day);
INSERT INTO reservations VALUES('0123456789abcdef','ann',20782,100);
PRAGMA user_version=2;
COMMIT;
