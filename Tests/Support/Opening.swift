package import QCOW2

extension Image {
    /// Opens the bytes of an image on a device in RAM.
    package static func open(
        bytes: [UInt8], backing: [Image.Backing] = [], options: OpenOptions = OpenOptions()
    ) throws(ImageError) -> Image {
        try open(
            RecordingDevice(bytes, name: "test.qcow2", yielding: false), backing: backing,
            options: options)
    }

    /// The guest bytes of `range`.
    package func bytes(_ range: Range<Int>) throws(ImageError) -> [UInt8] {
        var bytes = [UInt8](repeating: 0xDB, count: range.count)
        var failure: ImageError?
        bytes.withUnsafeMutableBytes { buffer in
            do throws(ImageError) {
                try read(into: buffer, at: UInt64(range.lowerBound))
            } catch { failure = error }
        }
        if let failure { throw failure }
        return bytes
    }

    package func write(_ bytes: [UInt8], at offset: Int) throws(ImageError) {
        try write(bytes, at: UInt64(offset))
    }
}

extension Passphrase {
    package convenience init(_ text: String) {
        let bytes = Array(text.utf8)
        self.init(bytes.count, bytes)
    }

    private convenience init(_ count: Int, _ bytes: [UInt8]) {
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: count, alignment: 1)
        defer { buffer.deallocate() }
        buffer.copyBytes(from: bytes)
        self.init(UnsafeRawBufferPointer(buffer))
    }
}

extension OpenOptions {
    /// Options with the passphrases that are tried on encrypted files.
    package init(
        access: Access = .readWrite, passphrases first: String, _ others: String...
    ) {
        self.init(
            access: access,
            passphrases: PassphraseSource(([first] + others).map { Passphrase($0) }))
    }

    package static var readOnly: OpenOptions { OpenOptions(access: .readOnly) }
}
