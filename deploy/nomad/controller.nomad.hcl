# On the SNODE: makes volumes, grants them to clients and takes them back.
#
#   nomad job run -var image=IMAGE -var 'portals=["192.0.2.10:3260"]' controller.nomad.hcl
#
# First give the SNODE's Nomad client `meta { snode_role = "snode" }`; docs/tutorials/nomad.md has all of it.

variable "image" {
  type        = string
  description = "the driver's image, with a tag other than latest (Nomad would pull that one at every start)"
}

variable "datacenters" {
  type    = list(string)
  default = ["dc1"]
}

variable "plugin_id" {
  type        = string
  default     = "snode"
  description = "what volume specifications call the driver (plugin_id)"
}

variable "portals" {
  type        = list(string)
  description = "addresses of the SNODE in the storage network, as clients reach tgtd there"
}

variable "pools" {
  type        = string
  description = "the SNODE's pools, in TOML; the first one is not special: set default_pool where there are several"
  default     = <<-EOT
    [pools.thick]
    type = "lvm"
    vg = "vg0"
  EOT
}

variable "default_pool" {
  type        = string
  default     = "thick"
  description = "pool of volumes whose specification names none"
}

variable "log_level" {
  type    = string
  default = "info"
}

job "snode-controller" {
  datacenters = var.datacenters
  type        = "service"
  # Without the driver no task with a volume starts or stops.
  priority = 100

  constraint {
    attribute = "${meta.snode_role}"
    value     = "snode"
  }

  group "controller" {
    # One: two controllers never drive one tgtd.
    count = 1

    # A plugin that gives up after some failures would leave every volume as it is, so it never does.
    restart {
      attempts = 10
      interval = "1m"
      delay    = "2s"
      mode     = "delay"
    }

    task "snode" {
      driver = "docker"

      config {
        image = var.image
        args  = ["controller", "--config", "/local/snode.toml"]
        # The host's LVM is run, in the host's own namespaces, and its tgtd is spoken to.
        privileged   = true
        pid_mode     = "host"
        network_mode = "host"
        # A pool of type files needs its folder here too, under the same path.
        volumes = [
          "/var/lib/snode:/var/lib/snode",
          "/run/tgtd:/run/tgtd",
          "/run/udev:/run/udev:ro",
        ]
      }

      # Nomad sets CSI_ENDPOINT to a socket in mount_dir.
      csi_plugin {
        id             = var.plugin_id
        type           = "controller"
        mount_dir      = "/csi"
        health_timeout = "60s"
      }

      template {
        destination = "local/snode.toml"
        data        = <<-EOT
          tools = "host"
          log_level = "${var.log_level}"

          [controller]
          portals = ${jsonencode(var.portals)}
          default_pool = "${var.default_pool}"

          ${var.pools}
        EOT
      }

      env {
        SNODE_NODE_NAME = "${node.unique.name}"
      }

      # Requests under way end by themselves (at most 25 s); a wipe goes on after the restart.
      kill_timeout = "30s"

      resources {
        cpu    = 50
        memory = 256
      }
    }
  }
}
