// Follow a task on Node: npm install eventsource && node follow.mjs http://127.0.0.1:8080/v1/tasks/ID/stream
// One line for each event: its id, its name, its data. It reconnects by itself and resumes where it was.
import { EventSource } from "eventsource"

const stream = new EventSource(process.argv[2])
const awake = setInterval(() => {}, 60_000) // or Node would exit while EventSource waits to reconnect

function stop(code) {
    stream.close()
    clearInterval(awake)
    process.exitCode = code
}

for (const name of ["started", "token", "end", "error"]) {
    stream.addEventListener(name, event => {
        if (event.data !== undefined) {
            console.log(event.lastEventId, name, event.data)
            if (name === "end" || name === "error") stop(0)
        } else if (stream.readyState === EventSource.CLOSED) {
            stop(event.code === 204 ? 0 : 1) // there was nothing more; or the server refused
        } // else a lost connection, which is called error, too
    })
}
