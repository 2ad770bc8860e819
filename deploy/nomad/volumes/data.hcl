# A volume of 1 GiB in the pool thick:   nomad volume create data.hcl
# To grow it, write a larger capacity_min and run the same command again; a task that uses it goes on meanwhile.
id           = "data"
name         = "data"
type         = "csi"
plugin_id    = "snode"
capacity_min = "1GiB"

capability {
  access_mode     = "single-node-writer"
  attachment_mode = "file-system"
}

mount_options {
  fs_type = "ext4"
}

parameters {
  pool = "thick"
}
