// BitWave PE (Shi et al., HPCA 2024): bit columns of a group of LANES weights in sign and magnitude;
// columns of zeros are skipped, so the columns that come carry their significance.
//
// Signs stay for the whole group. In offset form: unsigned activations, a negative weight's lane adds
// the complement, and the weights alone say what that adds too much.
module bitwave_pe #(
    parameter LANES = 8,
    parameter WIDTH = 8,
    parameter PSUM = 28
) (
    input                        clock,
    input                        reset,
    input                        load,
    input      [LANES*WIDTH-1:0] activations_in,  // the column's bus
    input      [2*LANES+2:0]     step_in,         // {significance, signs, a bit of every magnitude}
    input                        last_in,
    output reg [2*LANES+2:0]     step,
    output reg                   last,
    input      [PSUM-1:0]        psum_in,
    output     [PSUM-1:0]        psum
);
    localparam SUM = 2 * WIDTH + $clog2(LANES);
    localparam TREE = WIDTH + $clog2(LANES);

    reg  [LANES*WIDTH-1:0] activations;
    wire [LANES*TREE-1:0] words;
    wire [TREE-1:0] sum, carry, column;
    genvar i;
    generate
        for (i = 0; i < LANES; i = i + 1) begin : lane
            wire [WIDTH-1:0] x = activations[i*WIDTH +: WIDTH] ^ {WIDTH{step_in[LANES + i]}};
            assign words[i*TREE +: TREE] = {{(TREE-WIDTH){1'b0}}, x & {WIDTH{step_in[i]}}};
        end
    endgenerate
    carry_save_tree #(.WORDS(LANES), .WIDTH(TREE)) tree (
        .words(words), .low({(LANES-2){1'b0}}), .sum(sum), .carry(carry)
    );
    ripple_adder #(.WIDTH(TREE)) adder (.a(sum), .b(carry), .sum(column));
    wire [SUM-1:0] shifted = {{(SUM-TREE){1'b0}}, column} << step_in[2*LANES +: 3];
    late_sum #(.SUM(SUM + 1), .PSUM(PSUM)) back (
        .clock(clock), .reset(reset), .a({1'b0, shifted}), .b({(SUM+1){1'b0}}),
        .carry_in(2'b00), .last_in(last_in), .psum_in(psum_in), .psum(psum)
    );
    always @(posedge clock) begin
        if (load) activations <= activations_in;
        step <= step_in;
        last <= last_in & ~reset;
    end
endmodule
