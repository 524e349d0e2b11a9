//! The first program: fill a tensor in shared memory, run a kernel over it, read the result.
//! It needs a host: `strait serve`.

use strait_client::{Client, Dtype, NewTensor};

fn main() -> Result<(), strait_client::Error> {
    let client = Client::connect(None)?;
    let x = NewTensor {
        name: "x".into(),
        dtype: Dtype::Float64,
        shape: vec![1000, 1000],
    };
    let mut segment = client.create(&[x])?;
    for (number, element) in (0u32..).zip(segment.tensor_mut::<f64>("x")?) {
        *element = number.into();
    }
    let result = client
        .call("zscore")
        .input("x", &segment)
        .param("axis", 0)
        .send()?;
    println!(
        "first column, scaled: {:?}",
        &result.tensor("y")?.as_slice::<f64>()?[..1]
    );
    println!("bytes that the host copied: {}", result.copied_bytes);
    Ok(())
}
