# A task with a volume: it writes a line each second, every one on disk before the next.
#
#   nomad volume create volumes/data.hcl && nomad job run app.nomad.hcl

variable "image" {
  type    = string
  default = "busybox:1.37"
}

variable "datacenters" {
  type    = list(string)
  default = ["dc1"]
}

variable "volume" {
  type        = string
  default     = "data"
  description = "id of the volume"
}

job "app" {
  datacenters = var.datacenters

  group "app" {
    # One at a time: a volume for a single writer can't be in two places, so no canaries either.
    count = 1

    volume "data" {
      type            = "csi"
      source          = var.volume
      access_mode     = "single-node-writer"
      attachment_mode = "file-system"
    }

    # No `disconnect` block: its waits are for tasks that a lost client may still run. Here the SNODE has shut that client
    # out before the volume goes elsewhere, so the replacement starts as soon as Nomad notices.

    task "app" {
      driver = "docker"

      config {
        image        = var.image
        network_mode = "none"
        command      = "sh"
        args = [
          "-c",
          <<-EOT
            trap 'exit 0' TERM
            n=$(wc -l < /data/lines) 2>/dev/null || n=0
            while true; do
              n=$((n + 1))
              echo $n >> /data/lines && sync && echo written $n
              sleep 1
            done
          EOT
        ]
      }

      volume_mount {
        volume      = "data"
        destination = "/data"
      }

      # The volume is unmounted after this, so whatever the task has to finish belongs here.
      kill_timeout = "10s"

      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}
