import QCOW2
import TestSupport
import Testing

/// Opens the image on `device`, lets `body` change it, closes it, and hands the file to `judge`;
/// it must have no fault and no leak.
func changeImage(
    on device: RecordingDevice, backing: [Image.Backing] = [], _ body: (Image) throws -> Void,
    judge: (ReferenceReader) throws -> Void = { _ in },
    sourceLocation: SourceLocation = #_sourceLocation
) throws {
    let image = try Image.open(device, backing: backing)
    try body(image)
    try image.close()
    try device.bytes.withUnsafeBytes { bytes in
        let reader = try ReferenceReader(bytes)
        let audit = reader.audit()
        #expect(audit.faults == [], sourceLocation: sourceLocation)
        #expect(audit.leakCount == 0, sourceLocation: sourceLocation)
        try judge(reader)
    }
}

/// Changes the image that `builder` makes.
func changeImage(
    _ builder: ImageBuilder, backing: [Image.Backing] = [], _ body: (Image) throws -> Void,
    judge: (ReferenceReader) throws -> Void = { _ in },
    sourceLocation: SourceLocation = #_sourceLocation
) throws {
    try changeImage(
        on: RecordingDevice(builder.build(), yielding: false), backing: backing, body,
        judge: judge, sourceLocation: sourceLocation)
}
