#!/usr/bin/env bash
# Follow a task with curl: bash follow.sh http://127.0.0.1:8080/v1/tasks/ID/stream
# One line for each event: its id, its name, its data. A broken connection is resumed.
set -euo pipefail
last="" id="" event=""
while true; do
    while IFS= read -r line; do
        case $line in
            "id: "*) id=${line#id: } ;;
            "event: "*) event=${line#event: } ;;
            "data: "*)
                printf '%s %s %s\n' "$id" "$event" "${line#data: }"
                last=$id
                case $event in end | error) exit 0 ;; esac
                ;;
        esac
    done < <(curl -fsSN ${last:+-H "Last-Event-ID: $last"} "$1")
    wait $! && exit 0      # 204: there was nothing more
    [ $? != 22 ] || exit 1 # the server refused, and curl has said how
    sleep 1
done
