# A volume in a pool of type lvm-thin: it takes space as it is written.   nomad volume create thin.hcl
id           = "thin"
name         = "thin"
type         = "csi"
plugin_id    = "snode"
capacity_min = "1GiB"

capability {
  access_mode     = "single-node-writer"
  attachment_mode = "file-system"
}

# Several tasks on one client may read while one of them writes; on another client nobody does.
capability {
  access_mode     = "single-node-reader-only"
  attachment_mode = "file-system"
}

mount_options {
  fs_type     = "xfs"
  mount_flags = ["noatime"]
}

parameters {
  pool = "thin"
}
