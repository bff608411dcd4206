internal import Glibc
internal import QCOW2

/// The socket of a mount: its name, and who may speak to it.
///
/// It lies in Linux's abstract namespace, so that it needs no directory that can be written to, and
/// is named after the number of the mounted file system, which is in every mount table.
enum ControlSocket {
    /// Opens a stream socket and calls `use` with the address of the mount's socket.
    static func make(
        _ device: String, _ use: (Int32, __CONST_SOCKADDR_ARG, socklen_t) -> Int32
    ) throws(SystemError) -> Int32 {
        let descriptor = socket(
            AF_UNIX, Int32(SOCK_STREAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue), 0)
        guard descriptor >= 0 else { throw .last }
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        let name = [0] + Array("qcowfs/\(device)".utf8)
        let length = withUnsafeMutableBytes(of: &address.sun_path) { room -> Int in
            room.copyBytes(from: name.prefix(room.count))
            return MemoryLayout<sockaddr_un>.offset(of: \.sun_path)! + min(name.count, room.count)
        }
        let status = withUnsafePointer(to: address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                use(descriptor, __CONST_SOCKADDR_ARG(__sockaddr__: $0), socklen_t(length))
            }
        }
        guard status == 0 else {
            let error = SystemError.last
            close(descriptor)
            throw error
        }
        return descriptor
    }

    /// The process at the other end.
    static func peer(of descriptor: Int32) -> ucred? {
        var peer = ucred()
        var length = socklen_t(MemoryLayout<ucred>.size)
        guard getsockopt(descriptor, SOL_SOCKET, SO_PEERCRED, &peer, &length) == 0 else {
            return nil
        }
        return peer
    }

    /// Sets how long a read or a write may take.
    static func limit(_ descriptor: Int32, seconds: Int) {
        var time = timeval(tv_sec: seconds, tv_usec: 0)
        let length = socklen_t(MemoryLayout<timeval>.size)
        setsockopt(descriptor, SOL_SOCKET, SO_RCVTIMEO, &time, length)
        setsockopt(descriptor, SOL_SOCKET, SO_SNDTIMEO, &time, length)
    }

    static func send(_ text: String, to descriptor: Int32) {
        var text = text
        text.withUTF8 { bytes in
            var rest = bytes[...]
            while !rest.isEmpty {
                let part = UnsafeBufferPointer(rebasing: rest)
                let count = Glibc.send(
                    descriptor, part.baseAddress, part.count, Int32(MSG_NOSIGNAL))
                guard count > 0 else { return }
                rest = rest.dropFirst(count)
            }
        }
    }
}
