# On every client that runs tasks with volumes: attaches volumes and mounts them.
#
#   nomad job run -var image=IMAGE node.nomad.hcl
#
# docs/tutorials/nomad.md says what the clients need.

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
  description = "what volume specifications call the driver (plugin_id); the same as the controller's"
}

variable "data_dir" {
  type        = string
  default     = "/opt/nomad/data"
  description = "data_dir of the clients' own configuration, the same on all of them; no symbolic link in it"
}

variable "log_level" {
  type    = string
  default = "info"
}

locals {
  # Where Nomad has volumes staged and published. The driver mounts with the host's own tools, so the path has to be
  # the same one in the container and on the host.
  base = "${var.data_dir}/client/csi/node/${var.plugin_id}"
}

job "snode-node" {
  datacenters = var.datacenters
  # A system job: one on each client, stopped after everything else when a client is drained.
  type     = "system"
  priority = 100

  constraint {
    attribute = "${meta.snode_role}"
    operator  = "!="
    value     = "snode"
  }

  group "node" {
    # A drain stops this plugin as soon as the last task has ended, but only then does Nomad detach that task's volumes.
    # So the plugin stays for so long. (In the task block it would not do: Nomad forgets a plugin before that delay.)
    shutdown_delay = "15s"

    # A plugin that gives up after some failures would leave the client without volumes, so it never does.
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
        args  = ["node", "--config", "/local/snode.toml"]
        # iscsiadm, mkfs and mount are the host's, and iscsid is spoken to in the host's network.
        privileged   = true
        pid_mode     = "host"
        network_mode = "host"
        volumes = [
          "/var/lib/snode:/var/lib/snode",
          "/etc/iscsi:/etc/iscsi",
          "/var/lib/iscsi:/var/lib/iscsi",
          "/run/lock/iscsi:/run/lock/iscsi",
        ]
      }

      # Nomad sets CSI_ENDPOINT to a socket in mount_dir.
      csi_plugin {
        id                     = var.plugin_id
        type                   = "node"
        mount_dir              = "/csi"
        stage_publish_base_dir = local.base
        health_timeout         = "60s"
      }

      template {
        destination = "local/snode.toml"
        data        = <<-EOT
          tools = "host"
          log_level = "${var.log_level}"

          [node]
          target_roots = ["${local.base}"]
        EOT
      }

      env {
        SNODE_NODE_NAME = "${node.unique.name}"
      }

      # Requests under way end by themselves (at most 25 s).
      kill_timeout = "30s"

      resources {
        cpu = 50
        # e2fsck and mkfs of large volumes count too.
        memory = 512
      }
    }
  }
}
